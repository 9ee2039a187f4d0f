# Fill an environment for the tests in this folder: bash install.sh PYTHON
set -e
"$1" -m pip install --quiet torch==2.13.0
"$1" -m pip install --quiet torch==2.13.0 ms-swift==4.6.0 "filelock>=4.2" "pytest>=8.4"
