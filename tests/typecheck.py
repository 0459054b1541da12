"""How signatures are checked while the tests run: by beartype, with an int good for a float, as the language has it."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
