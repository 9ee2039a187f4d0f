"""Write grade-school word problems with worked answers, in the form of GSM8K.

    python quickstart/problems.py --count 4000 --seed 1 --split train --out train.jsonl

The problems and their language are in `gradselect.app.word_problems`, which `gradselect quickstart` uses too.
"""

from gradselect.app.word_problems import main, problems

__all__ = ["main", "problems"]

if __name__ == "__main__":
    main()
