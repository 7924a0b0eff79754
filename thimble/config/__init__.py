"""Typed configuration: ``schema`` says what there is, ``load`` makes it from a recipe."""
