"""The intermediate representation: torch.export's fx graph, a closed table of operators, four dialects."""
