"""How many tokens remain? Predictors answer; the scheduler treats every answer as advice."""
