"""One file per question: arms(setup, base), MEASURE, conclude(records, setup)."""
