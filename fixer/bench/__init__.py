"""SGLang's own configuration against the tuned one: in its MoE layer, row by row, and in whole servers under load."""
