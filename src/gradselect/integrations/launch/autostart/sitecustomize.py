"""Run by every Python of a launched command when it starts, because its folder is the first of PYTHONPATH.

It imports next to nothing: most of these processes never train.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys

NAME = "transformers.trainer"
HERE = os.path.dirname(os.path.abspath(__file__))


class AfterTrainer(importlib.abc.MetaPathFinder):
    """Calls `make_trainers_selective` when transformers.trainer has been imported."""

    def find_spec(self, name, path, target=None):
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            # Somebody may look for the module and not import it, or try again.
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_change(module):
            load(module)
            try:
                from gradselect.integrations.launch import make_trainers_selective
            except ImportError as error:
                raise ImportError(
                    f"`gradselect launch` started this command, but its Python, {sys.executable}, cannot import "
                    f"gradselect ({error}); run: {sys.executable} -m pip install gradselect"
                ) from error
            make_trainers_selective(module.Trainer, json.loads(os.environ["GRADSELECT_LAUNCH"]))

        spec.loader.exec_module = load_and_change
        return spec


def run_the_other():
    """Run the sitecustomize that this one hides, if there is any."""
    others = [path for path in sys.path if os.path.abspath(path) != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if "GRADSELECT_LAUNCH" in os.environ:
    sys.meta_path.insert(0, AfterTrainer())
run_the_other()
