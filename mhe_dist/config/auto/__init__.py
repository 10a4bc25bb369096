"""How `auto` sizes of a head become numbers."""
