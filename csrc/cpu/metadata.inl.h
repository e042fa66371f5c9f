/* metadata.inl.h - entries of a record's planes of scales and offsets. */
MKVQ_FN void put_metadata(uint8_t *plane, int64_t index, int metadata, uint16_t bits)
{
    if (metadata == MKVQ_META_FP16_FP16)
        memcpy(plane + 2 * index, &bits, 2);
    else
        plane[index] = (uint8_t)bits;
}

MKVQ_FN float get_metadata(const uint8_t *plane, int64_t index, int metadata)
{
    uint16_t half;
    if (metadata == MKVQ_META_E5M3_INT8)
        return mkvq_e5m3_value(plane[index]);
    memcpy(&half, plane + 2 * index, 2);
    return mkvq_f16_to_f32(half);
}

MKVQ_FN float get_offset(const uint8_t *plane, int64_t index, int metadata, float scale, int bits)
{
    if (metadata == MKVQ_META_E5M3_INT8)
        return (float)(int8_t)plane[index] * mkvq_offset_unit(scale, bits);
    return get_metadata(plane, index, metadata);
}
