"""Label unlabelled images with an ensemble: `predict`, `select`, `all`, `trust`; --help says what each does."""

from i3cl.cli.label import main

if __name__ == "__main__":
    main()
