#!/usr/bin/env bash
# A virtual environment with pip in it: make_venv.sh PYTHON FOLDER. Does nothing where one works.
set -euo pipefail
python=$1 folder=$2

fail() {
  printf 'setup: %s\n' "$@" >&2
  exit 1
}

works() { "$folder/bin/python" -m pip --version >/dev/null 2>&1; }

works && exit 0
command -v "$python" >/dev/null ||
  fail "there is no '$python' here" "install Python 3.11 or newer, or name it: make setup PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$("$python" --version 2>&1) is too old: this project needs Python 3.11 or newer" \
    "name another one: make setup PYTHON=python3.12"

echo "setup: making $folder with $("$python" --version 2>&1); the first time takes some minutes"
if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  "$python" -m venv --clear "$folder"
elif "$python" -c 'import venv, pip' 2>/dev/null; then
  # Debian keeps ensurepip in a package of its own; a pip that is here can install into the folder.
  "$python" -m venv --clear --without-pip "$folder"
  "$python" -m pip --python "$folder/bin/python" install --quiet pip ||
    fail "$python has neither ensurepip nor a pip that can install into $folder" \
      "install the missing part (Debian, Ubuntu: apt-get install python3-venv) and try again"
else
  fail "$python can make no virtual environment: it comes without venv or ensurepip" \
    "install the missing part (Debian, Ubuntu: apt-get install python3-venv) and try again"
fi
works || fail "$folder/bin/python has no working pip; remove $folder and try again"
