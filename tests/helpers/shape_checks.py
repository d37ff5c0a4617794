"""The type checker behind the shapes in signatures: beartype, with ints where floats are asked."""

from beartype import BeartypeConf, beartype


check = beartype(conf=BeartypeConf(is_pep484_tower=True))
