#!/bin/sh
# Run every check of zbackup in a virtual environment of its own; arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
venv=${ZBACKUP_VENV:-.venv}
python=${PYTHON:-python3}
unset PYTHONDONTWRITEBYTECODE # the tests start zbackup.py thousands of times: it is compiled once
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
if ! cmp -s tests/requirements.txt "$venv/requirements.done"; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
    cp tests/requirements.txt "$venv/requirements.done"
fi
"$venv/bin/ruff" check zbackup.py tests
"$venv/bin/ruff" format --check --quiet zbackup.py tests
"$venv/bin/mypy" --strict zbackup.py
"$venv/bin/mypy" --strict tests/bench/*.py
if [ $# -gt 0 ]; then
    exec "$venv/bin/python" -m pytest "$@"
fi
rm -f .coverage .coverage.*
# In two lots: what fills a table of the kernel, which all tests share, must have the machine to itself.
# worksteal: a process is given neighbours, which share what their module has made.
lot() { "$venv/bin/python" -m coverage run -m pytest -q -rs --timeout 300 -m "not alone" "$@" tests; }
code=0
lot -n 3 --dist worksteal --cache-clear || code=$?
if [ "$code" = 1 ]; then # 1: tests failed; what else went wrong would do so again
    # Tests that time signals can be upset by their neighbours; a real fault fails again, and the first one is enough.
    echo "run.sh: now those that failed once more, one at a time: if all of them pass, they do not count" >&2
    code=0
    lot --last-failed --last-failed-no-failures none --exitfirst || code=$?
fi
[ "$code" = 0 ] || exit "$code"
"$venv/bin/python" -m coverage run -m pytest -q -rs -m alone tests
"$venv/bin/python" -m coverage combine --quiet
"$venv/bin/python" -m coverage report --fail-under=95
