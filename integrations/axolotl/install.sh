# Fill an environment for the tests in this folder: bash install.sh PYTHON
# axolotl pins packages that need a GPU or gigabytes (xformers, fla, liger-kernel, ...): without them here.
set -e
"$1" -m pip install --quiet torch==2.13.0 numpy
"$1" -m pip install --quiet --no-deps axolotl==0.19.0 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6
"$1" -m pip install --quiet transformers==5.16.1 trl==1.9.0 accelerate==1.13.0 peft==0.20.0 datasets==4.8.4 \
    "pydantic==2.12.5" "PyYAML==6.0.3" addict fire colorama python-dotenv posthog==6.7.11 art schedulefree==1.4.1 einops \
    requests pillow numba bitsandbytes==0.50.2 fastcore triton evaluate wandb pandas sentencepiece "safetensors>=0.8" "filelock>=4.2" "pytest>=8.4"
