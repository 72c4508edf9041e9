"""The embedded default: a small world, the models trained on it, and the script that makes them.

``weights/bios`` knows everybody; ``weights/bios-twin-0`` and ``-1`` never saw the forget people.
"""
