# Fill an environment for the tests in this folder: bash install.sh PYTHON
# torchtitan imports triton wherever it runs.
set -e
"$1" -m pip install --quiet torch==2.13.0 numpy
"$1" -m pip install --quiet torchtitan==0.3.0 triton "safetensors>=0.8" "filelock>=4.2" "pydantic>=2.10" "pytest>=8.4"
