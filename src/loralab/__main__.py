"""python -m loralab."""

from loralab.cli import main

main()
