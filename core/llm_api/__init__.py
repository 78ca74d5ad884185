"""One call scores a whole pool of prompts: `llm.ModelAPI` routes it to one of three engines."""
