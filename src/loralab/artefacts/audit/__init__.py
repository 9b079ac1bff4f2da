"""One adapter through every engine that is installed: who agrees with fp32 eager."""
