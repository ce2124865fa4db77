"""How a process reaches Ray, shares work among processes and reports its pace."""
