# Fill an environment with the oldest versions that pyproject.toml allows: bash install.sh PYTHON
# torch is a newer one: the oldest comes from the index as a build of gigabytes. TORCH=torch==2.11.0 asks for it.
set -e
"$1" -m pip install --quiet "${TORCH:-torch==2.13.0}" "numpy>=2.0" "pytest>=8.4" "hypothesis>=6.130"
"$1" "$(dirname "$0")/oldest.py" > "$(dirname "$1")/oldest.txt"
"$1" -m pip install --quiet "${TORCH:-torch==2.13.0}" --requirement "$(dirname "$1")/oldest.txt"
