"""What a recipe needs before it runs: memory per GPU, work, traffic and disk, counted on a model that is not there."""
