"""Long captions written by a multimodal model: what is asked, which answers are kept, and the drivers that ask."""
