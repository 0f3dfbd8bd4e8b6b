#!/bin/sh
# Build zbackup.pyz, one file to copy onto the machines: sh build_pyz.sh [FILE]
# The same source gives the same bytes, on any machine.
set -eu
target=${1:-zbackup.pyz}
cd "$(dirname "$0")"
case $target in /*) ;; *) target=${OLDPWD:-.}/$target ;; esac
exec "${PYTHON:-python3}" - "$target" <<'PYTHON'
import os
import sys
import zipfile

MAIN = """\
import sys

if sys.version_info < (3, 9):
    sys.exit("zbackup needs Python 3.9 or newer; this is %d.%d" % sys.version_info[:2])

from zbackup import main

sys.exit(main())
"""

target = sys.argv[1]
temporary = "%s.%d.tmp" % (target, os.getpid())
with open("zbackup.py", encoding="utf-8") as source:
    files = {"__main__.py": MAIN, "zbackup.py": source.read()}
with open(temporary, "wb") as out:
    out.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            # Fixed date, mode and system, so that the bytes depend on the source alone.
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            info.external_attr = 0o100644 << 16
            archive.writestr(info, files[name])
os.chmod(temporary, 0o755)
os.replace(temporary, target)
PYTHON
