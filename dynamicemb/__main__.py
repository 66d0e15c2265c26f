"""``python -m dynamicemb``: the command of the same name."""

from dynamicemb.cli import main

main()
