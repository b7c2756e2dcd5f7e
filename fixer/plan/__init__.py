"""What SGLang would run on a card, whether it fits, and what to propose instead. Measures nothing."""
