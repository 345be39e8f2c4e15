"""The Twinslot server: a published tree over HTTPS, an offer to each board, its reports kept.

    python -m twinslot_server site/ --data site-server/

It selects and stores; it never signs. Whatever it says, a board installs only what a release key
has signed. Nothing here imports the host tools; the rules it shares with the device (``semver``,
``jws``, ``release``) are the device's own modules.
"""
