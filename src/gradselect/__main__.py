"""The command line, as `python -m gradselect`: for a Python whose scripts are not on the path."""

from gradselect.app.cli import main

if __name__ == "__main__":
    main()
