"""Selective training in LLaMA-Factory: its own commands, with a section `gradselect` in the YAML file.

    python -m gradselect.integrations.llamafactory train sft.yaml

The section holds the keys of a recipe's `method` and, if you like, `jsonl`, a file for the records:

    gradselect:
      name: adagradselect
      fraction: 0.2
      jsonl: selection.jsonl

Everything else goes to LLaMA-Factory as it is. With `USE_V1=1` it is LLaMA-Factory's v1.
"""

__all__: list[str] = []
