"""Checks of this machine, of SGLang's tree and of the data folder."""
