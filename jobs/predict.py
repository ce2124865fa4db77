"""Find text in images with a checkpoint: an ArT submission json, COCO results and drawn pictures."""

from i3cl.cli.predict import main

if __name__ == "__main__":
    main()
