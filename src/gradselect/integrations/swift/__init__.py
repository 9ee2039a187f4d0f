"""Selective training in ms-swift.

    swift sft ... --external_plugins $(gradselect plugin-path swift) --callbacks gradselect \
        --optim_args 'adagradselect fraction=0.2'

`--optim_args` holds the method's name, its settings and, if you like, `jsonl=FILE` for the records.
"""

__all__: list[str] = []
