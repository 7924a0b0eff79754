"""What leaves thimble: model cards and the formats of other programs."""
