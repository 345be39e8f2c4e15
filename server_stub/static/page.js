"use strict";
// The only script: a rollout's numbers as they change, and "are you sure?".
const live = document.querySelector("[data-events]");
if (live) {
  const source = new EventSource(live.dataset.events);
  const first = live.dataset.state;
  source.onmessage = (message) => {
    const now = JSON.parse(message.data);
    for (const [name, value] of Object.entries(now.counts)) {
      const cell = live.querySelector(`[data-count="${name}"]`);
      if (cell) cell.textContent = value;
      const bar = live.querySelector(`[data-bar="${name}"]`);
      if (bar) bar.setAttribute("value", now.counts.members ? value / now.counts.members : 0);
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
