#!/usr/bin/env bash
# Creates the environment of the embedded Triton server (about 1.4 GB, one to two minutes). Run again at will: it
# does nothing when the environment is already what this file and constraints.txt ask for.
#
#   scripts/setup_triton_env.sh [DIRECTORY]      default: $POSTTRAIN_TRITON_ENV, else .venv-triton
#
# It is separate because tritonserver's python backend needs numpy 1. PYTHON names the interpreter (3.11); it must be
# built with a shared libpython, which the backend's stub loads.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
directory=${1:-${POSTTRAIN_TRITON_ENV:-.venv-triton}}
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
constraints=$root/constraints.txt

pinned() { grep -E "^$1==" "$constraints"; }
torch=$(pinned torch)
models=$(printf '%s\n' transformers peft accelerate tokenizers safetensors huggingface_hub Jinja2 | while read -r name; do pinned "$name"; done)
server="nvidia-pytriton==0.7.0"
wanted=$(printf '%s\n' "$torch" "$models" "$server" 'numpy<2' "$("$python" --version)" | sha256sum | cut -d' ' -f1)
stamp=$directory/.posttrain-triton

if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    echo "$directory is up to date"
    exit 0
fi

"$python" - <<'PY' || { echo "error: $python cannot run the server; set PYTHON to another Python 3.11" >&2; exit 2; }
import glob, os, sys, sysconfig
libraries = os.path.join(sysconfig.get_config_var("LIBDIR") or "", "libpython3.11.so*")
if sys.version_info[:2] != (3, 11):
    sys.exit(f"the server's python backend is set up for Python 3.11, this is {sys.version.split()[0]}")
if not glob.glob(libraries):
    sys.exit(f"this Python has no shared library ({libraries}); on Debian install libpython3.11")
PY

echo "installing the Triton environment into $directory"
rm -f "$stamp"
"$python" -m venv --clear "$directory"
pip=("$directory/bin/python" -m pip install --quiet --disable-pip-version-check)
# torch first and by itself, so that its CPU build is taken where one is offered and nothing upgrades it later.
"${pip[@]}" "$torch" 'numpy<2'
# shellcheck disable=SC2086  # one requirement a word
"${pip[@]}" "$torch" 'numpy<2' $server $models
"$directory/bin/python" -c 'import numpy, peft, torch, transformers; assert numpy.__version__ < "2", numpy.__version__'
echo "$wanted" > "$stamp"
echo "$directory is ready"
