"use strict";
// The only script: a rollout's numbers as they change, how many devices a form would move, "are
// you sure?", and the way back.
const live = document.querySelector("[data-events]");
if (live) {
  const source = new EventSource(live.dataset.events);
  const first = live.dataset.state;
  source.onmessage = (message) => {
    const now = JSON.parse(message.data);
    const counts = { ...now.counts, bad: now.counts.failed + now.counts.rolledback };
    for (const [name, value] of Object.entries(now.counts)) {
      const cell = live.querySelector(`[data-count="${name}"]`);
      if (cell) cell.textContent = value;
    }
    let from = 0;
    for (const part of live.querySelectorAll("[data-part]")) {
      const width = counts.members ? (100 * counts[part.dataset.part]) / counts.members : 0;
      part.setAttribute("x", from);
      part.setAttribute("width", width);
      from += width;
    }
    for (const step of live.querySelectorAll("[data-step]")) {
      const place = Number(step.dataset.step) - now.stage;
      if (now.state !== "draft" && now.state !== "complete")
        step.className = place < 0 ? "done" : place === 0 ? "now" : "later";
    }
    live.querySelector("[data-stage]").textContent = now.stage + 1;
    live.querySelector("[data-state-name]").textContent = now.state;
    live.querySelector("[data-why]").textContent = now.why;
    if (now.state !== first) {
      source.close();
      location.reload(); // other buttons apply now
    }
  };
}
for (const form of document.querySelectorAll("form[data-ask]")) {
  form.addEventListener("submit", (event) => {
    if (!confirm(form.dataset.ask)) event.preventDefault();
  });
}
const words = (input) => (input ? input.value.split(/[\s,]+/).filter(Boolean) : []);
for (const form of document.querySelectorAll("form[data-reach]")) {
  const { firmware_id, label, nodes } = form.elements;
  let latest = 0;
  const count = async () => {
    const mine = ++latest;
    const release = form.dataset.reach || firmware_id.value;
    const labels = words(label).map((text) => `label=${encodeURIComponent(text)}`).join("&");
    const answer = await fetch(`/api/v1/firmware/${release}/reach?${labels}`);
    const moved = words(nodes).length || (answer.ok ? (await answer.json()).devices : "?");
    if (mine === latest) form.querySelector("[data-moves]").textContent = `moves ${moved} devices`;
  };
  form.addEventListener("input", count);
  count();
}
const back = document.querySelector("[data-back]");
if (back && document.referrer.startsWith(location.origin)) back.href = document.referrer;
