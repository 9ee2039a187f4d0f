# Fill an environment for the tests in this folder: bash install.sh PYTHON
set -e
"$1" -m pip install --quiet torch==2.13.0
"$1" -m pip install --quiet --no-deps llamafactory==0.9.5
# torchvision and torchaudio want a torch of their own version; pictures and sound do not occur in the tests.
"$1" - <<'END' | xargs -d '\n' "$1" -m pip install --quiet torch==2.13.0 transformers==5.6.0 "filelock>=4.2" "pytest>=8.4"
from importlib.metadata import requires

needs = [each for each in requires("llamafactory") if ";" not in each]
print("\n".join(each for each in needs if not each.startswith(("torch>", "torchaudio", "torchvision"))))
END
"$1" -c "import sysconfig, pathlib; (pathlib.Path(sysconfig.get_path('purelib')) / 'torchaudio.py').touch()"
