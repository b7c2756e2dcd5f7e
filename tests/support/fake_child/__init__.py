"""Stands in for the child that imports SGLang: answers what FAKE_ANSWER says, writes down that it was asked."""
