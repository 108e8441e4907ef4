"""Which ranks a network's layers could have, what each costs, and which of them a rule picks."""
