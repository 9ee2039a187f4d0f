"""BIPEFT: a search for the layers that get a LoRA and for their ranks, within a budget of parameters.

    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    search = AdapterSearch(model, SearchSettings(budget=100_000, num_steps=500))
    while not search.is_done:
        search.step([next(train_batches)], next(validation_batches))
    config = search.finish().lora_config(model.peft_config["default"])   # train this one from the start

Works for every model of transformers that PEFT puts a LoRA on, decoders and encoder-decoders too.

Chang et al., "BIPEFT: Budget-Guided Iterative Search for Parameter Efficient Fine-Tuning of Large Pretrained Language
Models", Findings of EMNLP 2024, arXiv 2410.09079. Only LoRA is searched here, no other adapter, no norms or biases.
"""

from .allocation import Allocation
from .search import AdapterSearch
from .settings import SearchSettings, check_ranks
from .sites import Site, budget_of_rank, sites_of

__all__ = ["AdapterSearch", "Allocation", "SearchSettings", "Site", "budget_of_rank", "check_ranks", "sites_of"]
