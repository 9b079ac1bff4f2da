"""Training loops of other libraries, with what `loralab train` does around a step."""
