"""Train all variants of a recipe (the other files of its folder) with several seeds and print a table of their scores."""

from i3cl.cli.ablation import main

if __name__ == "__main__":
    main()
