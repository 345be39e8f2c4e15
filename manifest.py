# Freeze Twinslot into a firmware of your own. In your board's manifest.py:
#
#     include("$(PORT_DIR)/boards/manifest.py")
#     include("/path/to/twinslot/manifest.py")                # or (..., boot=True)
#
# Frozen modules run from flash and leave the heap to the application. With boot=True the boot
# guard is frozen too: no file on the volume can then stand in its way.
metadata(
    description="Over-the-air updates that never leave a board dead",
    version="0.1.0",
    license="MIT",
)

options.defaults(boot=False)

package("twinslot", base_path="lib", opt=2)

if options.boot:
    module("boot.py", opt=2)
