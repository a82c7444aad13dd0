def check_base(base, model):
    return ""
