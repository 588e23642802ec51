"""Flags, environment and file: how a setting is declared, read and explained.

`flags` is the vocabulary: a part of the daemon declares its settings in a section, once. `parsers` turn
texts into values, `config` decides which source wins, `help` writes what users read. The list of all
sections is `mnemosyned/settings.py`.

The package knows no section and imports no other part, so that every part can declare its own.
"""
