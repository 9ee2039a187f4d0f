"""Training runs: a recipe in, a plain Hugging Face checkpoint out."""

from gradselect.app.recipe import Recipe, dump_recipe, load_recipe
from gradselect.app.runtime import Preempted

from .failures import is_out_of_memory
from .meter import Meter, kind_of_step
from .method_setup import mask_optimizer, method_parts
from .run import train
from .run_record import describe_start, differences
from .setup import build_trainer, loss_of_batch, num_steps_of

__all__ = [
    "Meter",
    "Preempted",
    "Recipe",
    "build_trainer",
    "describe_start",
    "differences",
    "dump_recipe",
    "is_out_of_memory",
    "kind_of_step",
    "load_recipe",
    "loss_of_batch",
    "mask_optimizer",
    "method_parts",
    "num_steps_of",
    "train",
]
