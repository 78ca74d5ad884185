"""The model layer as a web application: questions answered from a folder of texts, and claims scored."""
