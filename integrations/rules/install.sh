# Fill an environment for the tests in this folder: bash install.sh PYTHON
set -e
"$1" -m pip install --quiet torch==2.13.0 numpy
"$1" -m pip install --quiet torchao==0.18.0 lion-pytorch==0.2.5 schedulefree==1.4.1 "safetensors>=0.8" "filelock>=4.2" "pydantic>=2.10" "pytest>=8.4"
