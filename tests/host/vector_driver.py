"""Run by MicroPython: judge each vector of a file with the device's verifier; print its verdict.

micropython vector_driver.py LIB VECTORS
"""

import json
import sys

sys.path.insert(0, sys.argv[1])

from twinslot import jws, keyset
from twinslot.errors import SignatureError

with open(sys.argv[2]) as f:
    groups = json.load(f)["groups"]
verdicts = []
for group in groups:
    keys = keyset.load({"keys": [group["key"]]})
    for test in group["tests"]:
        try:
            jws.verify((test["message"] + "." + test["signature"]).encode(), keys)
            verdicts.append(True)
        except SignatureError:
            verdicts.append(False)
print(json.dumps(verdicts))
