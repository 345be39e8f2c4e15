"""``python -m twinslot_server SITE ...``: see ``serve``.

What it imports is never garbage. The collector looks for none in it meanwhile, which would be a
fifth of the time to start, nor later, in each of its full collections.
"""

import gc
import sys

gc.disable()
from . import serve  # noqa: E402

gc.freeze()
gc.enable()

if __name__ == "__main__":
    sys.exit(serve.main())
