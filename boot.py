# Runs at every boot, before main.py. The guard comes first: when the running firmware is on
# trial it starts the clock that leads back to the old one, whatever the application does.
import twinslot.guard

twinslot.guard.start()
