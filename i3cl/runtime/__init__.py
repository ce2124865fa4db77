"""How a process reaches Ray, how much there is to work with, how work is shared out, and how long it still takes."""
