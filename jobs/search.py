"""Search score thresholds, loss weights or any other settings with Ray Tune; the same command continues a sweep."""

from i3cl.cli.search import main

if __name__ == "__main__":
    main()
